"""What is known of GeForce cards by name: their peak, and how fast their memory is. Nothing else goes by name.

A streaming multiprocessor of every GeForce from Turing to Blackwell makes 512 dense floating-point operations a clock
with its tensor cores where float16 or bfloat16 products are summed in float32: half of what float16 sums reach, and a
quarter of the figures "with sparsity". Processors, boost clocks and bandwidths are those of NVIDIA's architecture white
papers (Turing, GA102, Ada, RTX Blackwell) and product pages. A laptop's card has other ones under the same number, by
its power limit: it is in no table, and is measured. One of Turing may have a desktop card's name; its PCI device
id tells it (core/gpuwatch.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from core.gpuwatch import is_laptop

FLOPS_PER_CLOCK = 512  # of one streaming multiprocessor
SOURCE = "NVIDIA's white papers: 512 dense operations a clock and processor, float32 sums, at the boost clock"


@dataclass(frozen=True)
class Card:
    processors: int
    boost: float  # Hz
    bandwidth: float  # bytes a second

    @property
    def flops(self) -> float:
        """Dense FLOP/s, bfloat16 or float16 summed in float32."""
        return FLOPS_PER_CLOCK * self.processors * self.boost


def _table(text: str) -> dict[str, Card]:
    """Lines of "name: processors, boost in MHz, bandwidth in GB/s"."""
    found = {}
    for line in text.strip().splitlines():
        name, _, figures = line.strip().partition(": ")
        processors, boost, bandwidth = (float(word) for word in figures.split(", "))
        found[name] = Card(int(processors), boost * 1e6, bandwidth * 1e9)
    return found


CARDS = _table(
    """
    2060: 30, 1680, 336
    2060 SUPER: 34, 1650, 448
    2070: 36, 1620, 448
    2070 SUPER: 40, 1770, 448
    2080: 46, 1710, 448
    2080 SUPER: 48, 1815, 496
    2080 Ti: 68, 1545, 616
    3050: 20, 1777, 224
    3060: 28, 1777, 360
    3060 Ti: 38, 1665, 448
    3070: 46, 1725, 448
    3070 Ti: 48, 1770, 608
    3080: 68, 1710, 760
    3080 Ti: 80, 1665, 912
    3090: 82, 1695, 936
    3090 Ti: 84, 1860, 1008
    4060: 24, 2460, 272
    4060 Ti: 34, 2535, 288
    4070: 46, 2475, 504
    4070 SUPER: 56, 2475, 504
    4070 Ti: 60, 2610, 504
    4070 Ti SUPER: 66, 2610, 672
    4080: 76, 2505, 717
    4080 SUPER: 80, 2550, 736
    4090: 128, 2520, 1008
    5060: 30, 2497, 448
    5060 Ti: 36, 2572, 448
    5070: 48, 2512, 672
    5070 Ti: 70, 2452, 896
    5080: 84, 2617, 960
    5090: 170, 2407, 1792
    """
)
# Other cards under the same name, which only their memory in GB tells apart.
BY_MEMORY = _table(
    """
    2060 12: 34, 1650, 336
    3050 6: 18, 1470, 168
    3060 8: 28, 1777, 240
    3080 12: 70, 1710, 912
    """
)


def known(name: str, memory: int = 0, laptop: bool = False) -> Card | None:
    """The card of a driver's name ("NVIDIA GeForce RTX 4070 Ti"), None for one that is in no table, as a laptop's is.

    Every word behind the number counts, as a "4070 Ti SUPER" is no 4070.
    """
    words = name.split()
    if laptop or is_laptop(name) or "RTX" not in words:
        return None
    wanted = " ".join(w for w in words[words.index("RTX") + 1 :] if not w.lower().endswith("gb"))
    return BY_MEMORY.get(f"{wanted} {round(memory / 2**30)}", CARDS.get(wanted))
