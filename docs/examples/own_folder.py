# %% [markdown]
# # A model of your own folder
#
# From a folder of images to a calibrated model, and to a flag for each new image. So that this page runs in
# a minute anywhere, the "photographs" are scikit-learn's handwritten 0, 1 and 2, and the unknown images are
# 7. With photographs of your own, leave the first cell out and give `ratioctl.train` your folder.

# %%
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
    folder = Path("photos", f"digit {label}") if label <= 2 else Path("inbox") if label == 7 else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).save(folder / f"{index}.png")

# %% [markdown]
# `train` looks at the folder, writes a recipe (`runs/photos/recipe.toml`), trains, and calibrates on images
# that it held out. The settings shorten it and switch off horizontal flips, because a mirrored digit is not a
# digit. Without them the recipe decides, see [Your own photographs](../guides/own-photographs.md).

# %%
import ratioctl

quick = ["model.width=8", "optim.epochs=15", "optim.ema=0.95", "data.augment.flip=false"]
model = ratioctl.train("photos", settings=quick)
print(", ".join(model.label_names), "- threshold", round(model.thresholds["tpr95"], 2))

# %% [markdown]
# `split:test:photos` are the images that neither training nor calibration has seen.

# %%
(report,) = ratioctl.evaluate(model, data="split:test:photos", ood={"sevens": "inbox"}, suite="clean")
for one in report.measurements:
    if one.name in ("accuracy", "auroc") and one.dataset != "mean":
        low, high = one.interval
        print(f"{one.name}: {one.value:.3f} (95 % interval {low:.3f} to {high:.3f}, n {one.n})")

# %%
rows = list(ratioctl.ood_score(["inbox"], model=model.path))
print(f"{sum(row.is_ood for row in rows)} of {len(rows)} sevens are flagged")
