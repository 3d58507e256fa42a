"""`ood-score --save-flagged`: counterfactual ladders of the flagged images, towards their predicted class."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ratioctl.cli._common import Context
from ratioctl.cli._progress import Progress
from ratioctl.errors import UsageError

if TYPE_CHECKING:
    from ratioctl.types import ScoreRow

MOST = 100  # images: each takes hundreds of forward and backward passes
STEPS = 100  # of each search, fewer than those of `ratioctl counterfactual`


@dataclasses.dataclass(kw_only=True)
class Flagged:
    """Collects the paths of flagged images, the first `MOST` of them."""

    out: Path
    model: str
    paths: list[str] = dataclasses.field(default_factory=list)
    total: int = 0

    @classmethod
    def opened(cls, out: Path | None, model: str) -> Flagged | None:
        """Checks the output folder and the model before anything is scored.

        Raises:
            UsageError: an ONNX file, which has no gradients. OutputError: the folder holds other files.
        """
        if out is None:
            return None
        from ratioctl.onnx import runtime
        from ratioctl.report.counterfactual_files import refuse_foreign

        if runtime.is_onnx_file(model):
            step = "Give the package it was exported from."
            raise UsageError("--save-flagged", "needs a package: an ONNX file has no gradients", step)
        refuse_foreign(out)
        return cls(out=out, model=model)

    def add(self, rows: Sequence[ScoreRow]) -> None:
        for row in rows:
            if row.is_ood:
                self.total += 1
                if len(self.paths) < MOST:
                    self.paths.append(row.path)

    def write(self, context: Context, bit_depth: int | None, threshold: float | None) -> None:
        """Search, and write what `ratioctl counterfactual --target predicted` writes.

        Args:
            threshold: confidence below which images were flagged; None takes the model's "tpr95".
        """
        from ratioctl import counterfactuals
        from ratioctl.report import counterfactual_files as report

        if not self.paths:
            context.note(f"Nothing was flagged, so nothing is written to {self.out}.")
            if (self.out / report.DOCUMENT).exists():
                context.warn(f"{self.out} still holds the counterfactuals of an earlier run")
            return
        if self.total > len(self.paths):
            context.warn(
                f"{self.total:,} images were flagged; the first {MOST} are explained. For others: "
                "ratioctl counterfactual PATH --target predicted"
            )
        prepared = counterfactuals.prepare(
            self.paths,
            target="predicted",
            steps=STEPS,
            threshold=threshold,
            model=self.model,
            seed=context.seed,
            bit_depth=bit_depth,
            out=self.out,
        )
        with Progress(context, len(prepared.sources), tenths=False) as progress:
            explanations = counterfactuals.explain(
                prepared,
                device=context.device,
                precision=context.precision,
                callback=lambda images: progress.update(images, "searching"),
            )
            report.write_counterfactuals(
                self.out,
                prepared.header,
                explanations,
                inputs=counterfactuals.files_of(prepared.sources),
                cards=prepared.cards,
            )
        context.note(f"Counterfactuals of the flagged images: {self.out / report.PAGE}")
