"""The object that users hold: a trained classifier that predicts, explains and exports."""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from PIL import Image

from ratioctl import api, package
from ratioctl import images as image_io
from ratioctl.errors import OutputError, UsageError
from ratioctl.package import ModelPackage, Spec
from ratioctl.scoring import pipeline
from ratioctl.scoring.backends import open_model
from ratioctl.types import Counterfactual, Explanation, Prediction
from ratioctl.utils import resources
from ratioctl.utils.defaults import DEFAULT_MODEL
from ratioctl.utils.ordered_pool import map_batches

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from ratioctl.onnx.export import Exported

    Path = str | os.PathLike[str]
    OneImage = Path | Image.Image | bytes
    Array = NDArray[Any] | torch.Tensor

DEFAULT_THRESHOLD = "tpr95"


class Classifier:
    """A trained classifier, made by `from_pretrained`.

    Examples:
        >>> clf = Classifier.from_pretrained("cifar10-ratio")
        >>> clf.predict("cat.jpg").label
        'cat'
        >>> explanation = clf.explain("cat.jpg", target="dog", eps="0.5..3")
        >>> explanation.image.save("dog.png")
    """

    def __init__(self, model: pipeline.Model, device: str) -> None:
        """Use `from_pretrained`."""
        self._model, self.device = model, device

    @classmethod
    @api.verb
    def from_pretrained(
        cls, model: Path | ModelPackage = DEFAULT_MODEL, *, device: str = "auto"
    ) -> Classifier:
        """Load a classifier.

        Args:
            model: the name of a bundled model (`Classifier.available()`), a package folder, a package, or an
                exported `.onnx` file. torch is loaded only for a package without `model.onnx`, on a GPU, and
                by `explain` and `module`.
            device: "auto", "cpu", "cuda" or "cuda:N".

        Raises:
            PackageError: missing, damaged or of an unknown format.
            UsageError: a device that is not there, or torch is needed and not installed.
        """
        loaded = open_model(model, None, device=device)
        return cls(loaded, device)

    @staticmethod
    def available() -> list[str]:
        """Names of the bundled models."""
        return package.bundled()

    def __repr__(self) -> str:
        size = "x".join(map(str, self.input_size))
        about = f"{self.spec.architecture}, {len(self.labels)} classes, {size}"
        device = "" if self.device == "auto" else f" on {self.device}"
        return f"Classifier({self.name!r}, {about}, {self._model.backend}{device})"

    @property
    def spec(self) -> Spec:
        """The checked `config.json`, or the block of it that an ONNX file carries."""
        return self._model.spec

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def labels(self) -> tuple[str, ...]:
        """The K class names, in the order of the logits."""
        return self.spec.label_names

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.spec.input_size

    @property
    def temperature(self) -> float:
        """Logits are divided by it before the softmax."""
        return self.spec.temperature

    @property
    def thresholds(self) -> dict[str, float]:
        """Confidences below which an image is OOD, by name; empty where the model is not calibrated."""
        return dict(self.spec.thresholds)

    @functools.cached_property
    def module(self) -> torch.nn.Module:
        """The network in eval mode: pixels (N, C, H, W) in [0,1] -> logits (N, K) before temperature.

        Raises:
            UsageError: an ONNX file, which has no weights, or torch is not installed.
        """
        device = "cpu" if self.device == "auto" else self.device
        return api.load_model(self._package("module"), device=device)

    @overload  # a str is a Sequence[str] too, and the first signature that fits is taken
    def predict(  # type: ignore[overload-overlap]
        self, images: OneImage, *, threshold: str | float | None = None
    ) -> Prediction: ...

    @overload
    def predict(
        self, images: Sequence[OneImage | Array], *, threshold: str | float | None = None
    ) -> Predictions: ...

    @overload
    def predict(self, images: Array, *, threshold: str | float | None = None) -> Prediction | Predictions: ...

    def predict(self, images: Any, *, threshold: str | float | None = None) -> Prediction | Predictions:
        """Classify one image or several.

        Args:
            images: a file name, PIL image, encoded bytes, uint8 array (H, W) or (H, W, C), or float array or
                tensor (C, H, W) in [0,1]; or a sequence of these, or an array with a leading axis N. Any
                size: the center square is resized to the model's input. Floats that have the model's size
                already are used as they are; all others are rounded to 8 bits.
            threshold: a stored name, or a confidence in [0,1]; None uses "tpr95" where there is one.

        Returns:
            A Prediction for one image, else Predictions, a sequence of them.

        Raises:
            ImageError: the first image that cannot be read.
            UsageError: something else than an image, or an unknown threshold.
        """
        given = image_io.as_list(images)
        one = len(given) == 1 and given[0] is images and getattr(images, "ndim", 0) != 4
        bound = self._bound(threshold)
        chunks = list(self._logits(given))
        if not chunks:
            return Predictions((), self.labels)
        scores = pipeline.score_logits(
            np.concatenate(chunks), self.spec, np.nan if bound is None else bound, self.spec.score
        )
        found = [
            Prediction(
                label=scores.labels[k],
                confidence=float(scores.confidence[k]),
                ood_score=float(scores.ood_score[k]),
                is_ood=None if bound is None else bool(scores.is_ood[k]),
                probabilities=scores.probabilities[k],
                labels=self.labels,
            )
            for k in range(len(scores.labels))
        ]
        return found[0] if one else Predictions(found, self.labels)

    def _bound(self, threshold: str | float | None) -> float | None:
        if threshold is None and DEFAULT_THRESHOLD not in self.spec.thresholds_of(self.spec.score):
            return None
        return package.threshold(self.spec, DEFAULT_THRESHOLD if threshold is None else threshold)

    def _logits(self, given: Sequence[object]) -> Iterator[np.ndarray]:
        """Logits (n, K) of parts of the images, in order; decoded and computed in parallel."""

        def units() -> Iterator[image_io.Item | np.ndarray]:
            for index, image in enumerate(given):
                pixels = self._exact_floats(image)
                yield from image_io.items_of_value(image, index) if pixels is None else pixels

        def work(batch: Sequence[image_io.Item | np.ndarray]) -> np.ndarray:
            parts = itertools.groupby(batch, key=lambda unit: isinstance(unit, np.ndarray))
            return np.concatenate(
                [self._model.predict(np.stack([*map(self._pixels, part)])) for _, part in parts]
            )

        size = pipeline.batch_size(self.spec.frame.area)
        return map_batches(units(), work, batch=size, workers=resources.processors(), name="predict")

    def _exact_floats(self, image: Any) -> np.ndarray | None:
        """(n, C, H, W) float32 of a float array that has the model's size already, else None."""
        if (
            not hasattr(image, "ndim")
            or image.ndim not in (3, 4)
            or tuple(image.shape[-3:]) != self.input_size
        ):
            return None
        array = image_io.as_array(image)
        return (
            None if array.dtype == np.uint8 else np.asarray(array, np.float32).reshape(-1, *self.input_size)
        )

    def _pixels(self, unit: image_io.Item | np.ndarray) -> np.ndarray:
        if isinstance(unit, np.ndarray):
            return unit
        return image_io.decode(unit.read(), self.spec.frame, self.input_size[0], name=unit.path).pixels

    @api.verb
    def explain(
        self,
        image: OneImage | Array,
        *,
        target: str | Sequence[str],
        eps: str | float | Sequence[float] | None = None,
        norm: str | float = "2",
        steps: int = 500,
        restarts: int = 1,
        seed: int = 0,
        until: float | None = None,
        region: Any = None,
        region_space: Literal["input", "image"] = "input",
        bit_depth: int | None = None,
        precision: str = "auto",
    ) -> ImageExplanation:
        """Find how the image would have to change, within balls, to be predicted as `target`.

        Args: as `ratioctl.counterfactual`; `image` is one image of any form that `predict` takes.

        Raises:
            UsageError: an unknown class or radius, an ONNX file (it has no gradients), or torch is not
                installed.
            ImageError: the image cannot be read.
        """
        from ratioctl import counterfactuals

        prepared = counterfactuals.prepare(
            image,
            target=target,
            eps=eps,
            model=self._package("explain").path,
            norm=norm,
            steps=steps,
            restarts=restarts,
            seed=seed,
            until=until,
            region=region,
            region_space=region_space,
            bit_depth=bit_depth,
        )
        if len(prepared.sources) != 1:
            raise UsageError("image", f"holds {len(prepared.sources)} images", "Explain one at a time.")
        (found,) = counterfactuals.explain(prepared, device=self.device, precision=precision)
        return ImageExplanation(explanation=found, header=prepared.header, cards=prepared.cards)

    def export(
        self,
        output: Path | None = None,
        *,
        input_type: Literal["float", "uint8"] = "float",
        threshold: str | float = DEFAULT_THRESHOLD,
        int8: bool = False,
        weights: Literal["fp32", "fp16"] | None = None,
        layout: str = "file",
        opset: int | None = None,
        threshold_input: bool = False,
        explain: bool = False,
        norm: str | float = "2",
        data: str | None = None,
        download: bool = False,
    ) -> Exported:
        """Write one self-contained ONNX file; see `ratioctl.onnx.export.export`."""
        return api.export(
            self._package("export"),
            output=output,
            input_type=input_type,
            threshold=threshold,
            int8=int8,
            weights=weights,
            layout=layout,
            opset=opset,
            threshold_input=threshold_input,
            explain=explain,
            norm=norm,
            data=data,
            download=download,
        )

    def verify(self) -> list[tuple[str, str | None]]:
        """Compare every file of the package with its recorded SHA-256: (name, fault or None) each."""
        return package.check(self._package("verify").path)

    def save_pretrained(self, folder: Path) -> None:
        """Write the package to a new folder, from which `from_pretrained` loads it.

        Raises:
            OutputError: the folder holds something, or cannot be written. DiskError: the disk is full.
            UsageError: an ONNX file, which is one file already.
        """
        source = self._package("save_pretrained")
        if os.path.isdir(folder) and os.listdir(folder):
            raise OutputError(folder, "is not empty", "Name a new folder.")
        package.write(
            folder,
            config=source.config,
            weights=source.weights_path.read_bytes(),
            recipe_text=source.recipe_text,
            card=source.card,
            onnx=source.onnx_path,
        )

    def _package(self, wanted: str) -> ModelPackage:
        if isinstance(self.spec, ModelPackage):
            return self.spec
        step = "Load the package it was exported from."
        raise UsageError(wanted, "needs a package: an ONNX file has no weights", step)


class Predictions(Sequence[Prediction]):
    """Predictions of several images, in their order, with each value as one array."""

    def __init__(self, predictions: Iterable[Prediction], labels: tuple[str, ...]) -> None:
        self._predictions, self._labels = tuple(predictions), labels

    @overload
    def __getitem__(self, index: int) -> Prediction: ...

    @overload
    def __getitem__(self, index: slice) -> Predictions: ...

    def __getitem__(self, index: int | slice) -> Prediction | Predictions:
        found = self._predictions[index]
        return found if isinstance(found, Prediction) else Predictions(found, self._labels)

    def __len__(self) -> int:
        return len(self._predictions)

    def __repr__(self) -> str:
        flagged = sum(one.is_ood is True for one in self)
        return f"<Predictions of {len(self)} images, {flagged} out of distribution>"

    @property
    def label(self) -> tuple[str, ...]:
        return tuple(one.label for one in self)

    @property
    def confidence(self) -> NDArray[np.float64]:
        """(N,)."""
        return np.array([one.confidence for one in self], np.float64)

    @property
    def ood_score(self) -> NDArray[np.float64]:
        """(N,)."""
        return np.array([one.ood_score for one in self], np.float64)

    @property
    def is_ood(self) -> tuple[bool | None, ...]:
        return tuple(one.is_ood for one in self)

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """(N, K)."""
        return np.array([one.probabilities for one in self], np.float64).reshape(-1, len(self._labels))

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain JSON values, one table per image."""
        return [one.to_dict() for one in self]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImageExplanation:
    """The counterfactuals of one image; what is shown is the one of the largest radius of the first target.

    Attributes:
        explanation: everything found: `original`, and for each target its budgets and flip radius.
        header: the head of `counterfactuals.json`.
        cards: the model's card.
    """

    explanation: Explanation
    header: dict[str, Any]
    cards: tuple[str | None, ...]

    @property
    def target(self) -> str:
        return self.explanation.targets[0].target

    @property
    def counterfactuals(self) -> tuple[Counterfactual, ...]:
        """One per radius, ascending."""
        return self.explanation.targets[0].budgets

    @property
    def array(self) -> NDArray[np.uint8]:
        """(H, W, C), the counterfactual of the largest radius."""
        return self.counterfactuals[-1].image

    @property
    def image(self) -> Image.Image:
        """`array` as a PIL image."""
        from ratioctl.report.pictures import picture

        return picture(self.array)

    @property
    def confidence(self) -> float:
        """The model's confidence in the target for `image`."""
        return self.counterfactuals[-1].confidence

    @property
    def flip_eps(self) -> float | None:
        """The smallest radius found at which the target is predicted: an upper bound; None where none is."""
        return self.explanation.targets[0].flip_eps

    def save(self, folder: Path) -> Explanation:
        """Write what `ratioctl counterfactual` writes. Raises OutputError, DiskError."""
        from ratioctl.report import counterfactual_files

        (saved,) = counterfactual_files.write_counterfactuals(
            folder, self.header, [self.explanation], cards=self.cards
        )
        return saved

    def grid(self) -> Image.Image:
        """The original and the counterfactual of each radius, side by side."""
        from ratioctl.report.pictures import grid

        labels = self.header["models"][0]["labels"]
        return grid(self.explanation, self.explanation.targets[0], labels=labels, norm=self.header["norm"])

    def __repr__(self) -> str:
        return f"<ImageExplanation of {self._in_words()}>"

    def _in_words(self) -> str:
        radii = ", ".join(f"{one.eps:g}: {one.confidence:.3f}" for one in self.counterfactuals[:8])
        more = ", ..." if len(self.counterfactuals) > 8 else ""
        norm = self.header["norm"]
        name = os.path.basename(self.explanation.path)
        return f"{name!r} towards {self.target!r}, confidence at l{norm} {radii}{more}"

    def _repr_png_(self) -> bytes:
        from ratioctl.report.pictures import png_of

        return png_of(self.grid())

    def _repr_html_(self) -> str:
        """For notebooks: the grid, and what it shows in words."""
        uri = base64.b64encode(self._repr_png_()).decode("ascii")
        said = html.escape(self._in_words())
        picture = f'<img src="data:image/png;base64,{uri}" alt="{said}">'
        return f"<figure>{picture}<figcaption>{said}</figcaption></figure>"
