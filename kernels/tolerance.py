"""How far a kernel's numbers may be from exact ones. Loads nothing: benchmarks of every backend ask it."""

from __future__ import annotations

# By compute dtype: the root mean square of the difference, as a share of that of what is wanted.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.01}
