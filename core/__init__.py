"""The backend-agnostic heart: contract, clock, data, score, trust, record and loop. Imports neither torch nor mlx."""
