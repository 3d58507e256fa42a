# %% [markdown]
# # Evaluation of a model that was trained elsewhere
#
# A torchvision classifier, trained without ratioctl, is imported, calibrated and measured. The first two
# cells stand for your own data and training: scikit-learn's digits as images in folders, and plain PyTorch
# that ends with a file of weights.

# %%
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
    part = "train" if index < 1000 else "calibration" if index < 1400 else "test"
    folder = Path("images", part, str(label))
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 15.9).astype("uint8")).resize((32, 32)).save(folder / f"{index}.png")

# %%
import torch
import torchvision
from torchvision.transforms import v2

torch.manual_seed(0)
to_pixels = v2.Compose(
    [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
)
data = torchvision.datasets.ImageFolder("images/train", to_pixels)
network = torchvision.models.resnet18(num_classes=10)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
for _ in range(3):
    for x, y in torch.utils.data.DataLoader(data, batch_size=50, shuffle=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
torch.save(network.state_dict(), "weights.pt")

# %% [markdown]
# The import needs what the weights do not say: architecture, class names in the order of the outputs, input
# size and normalization. `data` checks them: a wrong normalization or order of labels shows as a low
# accuracy.

# %%
import ratioctl

imported = ratioctl.package_checkpoint(
    "weights.pt",
    arch="torchvision:resnet18",
    labels=data.classes,
    input_size=32,
    mean=0.5,
    std=0.5,
    data="images:calibration",
    out="mine",
)
print("accuracy on the images given:", round(imported.checked.accuracy, 3))

# %% [markdown]
# Temperature and thresholds, on images that the training has not seen:

# %%
calibrated = ratioctl.calibrate(imported.package, data="images:calibration").package
print(
    "temperature", round(calibrated.temperature, 2), "- threshold", round(calibrated.thresholds["tpr95"], 2)
)

# %% [markdown]
# Accuracy, calibration, robustness and the worst case of OOD detection, on other images again. `limit`
# keeps this page quick; every number comes with its interval. A classifier without adversarial training has
# little robustness and, under attack, no OOD detection:

# %%
(report,) = ratioctl.evaluate(calibrated, data="images:test", ood={"noise": "noise:smooth"}, limit=100)
for one in report.measurements:
    if one.interval is not None:
        low, high = one.interval
        print(f"{one.name} ({one.dataset}): {one.value:.3f} ({low:.3f} to {high:.3f}), n {one.n}")
for warning in report.warnings:
    print("warning:", warning)
