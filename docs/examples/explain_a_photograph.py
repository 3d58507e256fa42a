"""Counterfactuals of a photograph: how would it have to change for the model to see a dog?"""

import ratioctl

clf = ratioctl.Classifier.from_pretrained("cifar10-ratio")
before = clf.predict("assets/samples/cat.jpg")
print(f"original: {before.label} {before.confidence:.2f}")

explanation = clf.explain("assets/samples/cat.jpg", target="dog", eps=[0.5, 1, 2], steps=50)
explanation.save("counterfactuals")  # the images, counterfactuals.json and index.html
print(f"largest budget: dog {explanation.confidence:.2f}")
