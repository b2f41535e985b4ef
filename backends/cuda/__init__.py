"""The backend for data-centre NVIDIA cards."""
