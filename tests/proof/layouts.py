"""The layouts of the proof: every placement, on 1 to 8 ranks."""

from dataclasses import dataclass
from typing import Literal

from mimo_strategy import ModuleParallel as P

Placement = Literal[
    "colocated equal", "colocated fan-in", "colocated fan-out", "disjoint equal", "disjoint fan-in",
    "disjoint fan-out", "text only",
]  # fmt: skip


@dataclass(frozen=True)
class ProofLayout:
    """Ranks and both modules' layouts; ``images`` is ``None`` for the language model alone."""

    world_size: int
    images: P | None
    language: P

    @property
    def modules(self) -> dict[str, P]:
        """As ``MimoHeteroStrategy`` takes them."""
        return ({} if self.images is None else {"images": self.images}) | {"language": self.language}

    @property
    def placement(self) -> Placement:
        """Where the modules run, and whether lanes of images are joined (fan-in) or divided (fan-out)."""
        if self.images is None:
            return "text only"
        where = "disjoint" if self.language.rank_offset or self.images.rank_offset else "colocated"
        if self.images.dp == self.language.dp:
            return f"{where} equal"
        return f"{where} {'fan-in' if self.images.dp > self.language.dp else 'fan-out'}"

    @property
    def largest_dp(self) -> int:
        """What the samples of a microbatch are cut into."""
        return max(module.dp for module in self.modules.values())

    def __str__(self) -> str:
        return " / ".join(f"{name} {_factors(module)}" for name, module in self.modules.items())


def _factors(module: P) -> str:
    named = {name: getattr(module, name) for name in ("tp", "dp", "pp", "ep", "etp")}
    return " ".join(f"{name}{size}" for name, size in named.items() if size > 1) or "dp1"


def colocated(images: P, language: P) -> ProofLayout:
    """Both on the same ranks."""
    return ProofLayout(language.tp * language.dp, images, language)


def disjoint(images: P, language: P) -> ProofLayout:
    """The encoder on the first ranks, the language model on those after."""
    first = images.tp * images.dp
    return ProofLayout(
        first + language.tp * language.dp * language.pp,
        images,
        P(tp=language.tp, dp=language.dp, pp=language.pp, ep=language.ep, etp=language.etp, rank_offset=first),
    )


def text(language: P) -> ProofLayout:
    """The language model alone."""
    return ProofLayout(language.tp * language.dp * language.pp, None, language)


LAYOUTS = (
    colocated(P(dp=1), P(dp=1)),
    colocated(P(dp=2), P(dp=2, ep=2)),
    colocated(P(tp=2, dp=1), P(tp=2, dp=1, ep=2)),
    colocated(P(tp=2, dp=1), P(tp=2, dp=1, etp=2)),
    colocated(P(dp=3), P(dp=3)),
    colocated(P(tp=2, dp=2), P(tp=2, dp=2, ep=2, etp=2)),
    colocated(P(tp=4, dp=1), P(tp=4, dp=1, ep=4)),
    colocated(P(tp=2, dp=4), P(tp=2, dp=4, ep=4, etp=2)),
    colocated(P(dp=2), P(tp=2, dp=1)),
    colocated(P(dp=4), P(tp=2, dp=2, ep=2)),
    colocated(P(tp=2, dp=2), P(tp=4, dp=1, ep=2, etp=2)),
    colocated(P(dp=4), P(tp=4, dp=1, etp=4)),
    colocated(P(dp=6), P(tp=2, dp=3, ep=2)),
    colocated(P(tp=2, dp=4), P(tp=4, dp=2, ep=4)),
    colocated(P(tp=2, dp=1), P(dp=2, ep=2)),
    colocated(P(tp=2, dp=2), P(dp=4, ep=2, etp=2)),
    colocated(P(tp=4, dp=1), P(tp=2, dp=2, etp=2)),
    colocated(P(tp=4, dp=1), P(dp=4, ep=4)),
    colocated(P(tp=4, dp=2), P(dp=8, ep=4)),
    disjoint(P(dp=1), P(dp=1)),
    disjoint(P(dp=2), P(dp=2, ep=2)),
    disjoint(P(dp=1), P(tp=4, dp=1, ep=4)),
    disjoint(P(dp=1), P(dp=1, pp=3)),
    disjoint(P(tp=2, dp=2), P(tp=2, dp=2, ep=2, etp=2)),
    disjoint(P(dp=2), P(dp=2, pp=3)),
    disjoint(P(dp=2), P(dp=1)),
    disjoint(P(dp=2), P(dp=1, pp=2)),
    disjoint(P(dp=2), P(tp=2, dp=1, ep=2)),
    disjoint(P(dp=4), P(dp=1)),
    disjoint(P(dp=4), P(dp=1, pp=3)),
    disjoint(P(tp=2, dp=2), P(tp=2, dp=1, etp=2)),
    disjoint(P(dp=4), P(tp=2, dp=2, ep=4)),
    disjoint(P(dp=1), P(dp=2, ep=2)),
    disjoint(P(tp=2, dp=1), P(dp=2)),
    disjoint(P(dp=1), P(dp=2, pp=2, ep=2)),
    disjoint(P(tp=2, dp=1), P(tp=2, dp=2, ep=2)),
    disjoint(P(dp=1), P(dp=2, pp=3, etp=2)),
    disjoint(P(dp=1), P(tp=2, dp=3, etp=2)),
    disjoint(P(tp=4, dp=1), P(dp=4, ep=4)),
    text(P(dp=1, pp=2)),
    text(P(dp=1, pp=3)),
    text(P(tp=2, dp=1, ep=2)),
    text(P(dp=4, ep=2, etp=2)),
    text(P(tp=2, dp=1, pp=2, ep=2)),
    text(P(tp=2, dp=1, pp=3, etp=2)),
    text(P(tp=2, dp=2, pp=2, ep=4)),
)
