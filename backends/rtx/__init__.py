"""The backend for GeForce and other consumer NVIDIA cards: little memory, other programs on the card, Windows."""
