# %% [markdown]
# # ONNX in ten lines
#
# An exported model flags images by itself: normalization, temperature, softmax and threshold are in the
# graph. Exporting needs `pip install "ratioctl[torch]"`:

# %%
import ratioctl

exported = ratioctl.export("cifar10-ratio", output="model.onnx", input_type="uint8")

# %% [markdown]
# Ten lines answer with it. They need onnxruntime and, to decode images exactly as the commands do,
# `ratioctl` without PyTorch.

# %%
import json

import onnxruntime

from ratioctl import images
from ratioctl.utils import resources

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
labels = json.loads(session.get_modelmeta().custom_metadata_map["ratioctl"])["label_names"]
photograph = resources.folder("assets") / "samples" / "rocket.jpg"
pixels = images.decode(photograph, 32).pixels
_, _, label, confidence, _, is_ood = session.run(None, {"image": pixels[None]})
print(f"{labels[label[0]]}, confidence {confidence[0]:.3f}, out of distribution: {bool(is_ood[0])}")
