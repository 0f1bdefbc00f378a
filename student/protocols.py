"""Rules by which published evaluations of saliency maps differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

Ties = Literal["expected", "jitter", "none", "joined"]
Grid = Literal["closed", "open", "full"]
Denominator = Literal["negatives", "fixations"]
Normalisation = Literal["minmax", "density"]

Measure = Literal["auc_judd", "auc_borji", "auc_shuffled", "nss", "cc", "sim", "kld", "ig"]

MEASURES: Final[tuple[Measure, ...]] = get_args(Measure)
ON_DENSITIES: Final[frozenset[Measure]] = frozenset({"cc", "sim", "kld"})
"""Measures that compare with a density; the others look at fixations."""
EPSILON: Final = 2.0**-52
"""MATLAB's eps."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Rules in which published evaluations differ."""

    name: str = "dhf1k"
    """What the rules are called."""
    ties: Ties = "expected"
    """AUC-Judd of equal values; see ``auc_judd``."""
    grid: Grid = "closed"
    """Thresholds of AUC-Borji and shuffled AUC; see ``auc_borji``."""
    splits: int | None = None
    """Random draws of negatives that these are a mean over; None for the exact expectation."""
    denominator: Denominator = "negatives"
    """What the false positive rate of a drawn shuffled AUC is a share of; see ``auc_shuffled``."""
    seed: int = 0
    """Of jitter and splits; every frame starts anew with it."""
    ddof: int = 1
    """The standard deviation in NSS divides by the number of pixels less this."""
    constant_score: float = float("nan")
    """NSS, and CC with a varying density, of a constant prediction."""
    sim_minmax: bool = True
    """Whether SIM takes the minimum off both maps."""
    sim_of_zero: float = 0.0
    """SIM where a map is zero everywhere and ``sim_minmax`` holds."""
    repair: bool = False
    """Whether SIM without minimum taken off, KLD and the density form of IG raise negative maps to
    a minimum of 0, and take zero maps for uniform."""
    kld_epsilon: float = EPSILON
    """Keeps KLD finite where a map is zero."""
    ig_normalise: Normalisation = "minmax"
    """How IG makes densities of maps; see ``ig``."""
    resize: bool = True
    """Whether predictions of another size than the ground truth are resized; else an error."""
    headline: Literal["micro", "macro"] = "micro"
    """The data set's score: the mean over frames, or over videos of their means."""

    def __post_init__(self) -> None:
        if self.splits is None and self.grid == "open":
            raise ValueError('the grid "open" is one of drawn negatives: give the number of splits')
        if self.splits is not None and (self.splits < 1 or self.grid == "full"):
            raise ValueError(
                'splits must be positive, and have no meaning for the grid "full", got '
                f"{self.splits} and {self.grid!r}"
            )


PROTOCOLS: Final[Mapping[str, Protocol]] = {
    "dhf1k": Protocol(),
    "tinyhd": Protocol(
        name="tinyhd",
        ties="jitter",
        grid="open",
        splits=100,
        denominator="fixations",
        ddof=0,
        sim_of_zero=float("nan"),
        resize=False,
        headline="macro",
    ),
    "pysaliency": Protocol(
        name="pysaliency",
        ties="joined",
        grid="full",
        ddof=0,
        constant_score=0.0,
        sim_minmax=False,
        repair=True,
        kld_epsilon=2.2204e-16,
        ig_normalise="density",
        resize=False,
    ),
}
"""``dhf1k`` is the DHF1K benchmark's MATLAB code made deterministic; ``tinyhd`` TinyHD's scripts,
which have neither KLD nor IG: these are the first one's; ``pysaliency`` the library's functions."""
