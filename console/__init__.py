"""What the command line shows and asks: every verb's work that is not research itself."""
