# %% [markdown]
# # Counterfactuals of a photograph
#
# How would this cat have to change for the model to see a dog? The sample photograph is part of the
# installed package; put the path of one of yours in its place. Needs `pip install "ratioctl[torch]"`.

# %%
import ratioctl
from ratioctl.utils import resources

photograph = resources.folder("assets") / "samples" / "cat.jpg"
clf = ratioctl.Classifier.from_pretrained("cifar10-ratio")
before = clf.predict(photograph)
print(f"{before.label}, confidence {before.confidence:.2f}, out of distribution: {before.is_ood}")

# %% [markdown]
# One search for each budget. A budget is the largest l2 distance by which the image may change, with pixels
# in [0,1]. 500 steps are the default; 50 are enough for a look.

# %%
explanation = clf.explain(photograph, target="dog", eps=[0.5, 1, 2, 3], steps=50)
explanation

# %% [markdown]
# The confidence is that of the saved 8-bit image, and the distance is measured on it too.

# %%
for budget in explanation.counterfactuals:
    print(f"budget {budget.eps:g}: {budget.predicted}, dog {budget.confidence:.2f}, OOD: {budget.is_ood}")

# %% [markdown]
# The images, `counterfactuals.json` and `index.html`, a page with a slider over the budget:

# %%
saved = explanation.save("counterfactuals")
print("flips at l2", round(saved.targets[0].flip_eps, 2))
