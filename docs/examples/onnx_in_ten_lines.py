"""An exported model in ten lines, without PyTorch."""

import json

import onnxruntime

from ratioctl import images

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
config = json.loads(session.get_modelmeta().custom_metadata_map["ratioctl"])
pixels = images.decode("assets/samples/rocket.jpg", config["pretrained_cfg"]["input_size"][1]).pixels
_, _, label, confidence, _, is_ood = session.run(None, {"image": pixels[None]})
print(config["label_names"][label[0]], f"{confidence[0]:.3f}", bool(is_ood[0]))
