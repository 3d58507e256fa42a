# %% [markdown]
# # RATIO beside a plain model
#
# The same question to two models: how would this rocket have to change for the model to see a dog? Neither
# model knows rockets. A model that was trained plainly is certain after a change that nobody sees; a RATIO
# model flags the original as out of distribution and is confident only once a dog is visible.

# %%
import ratioctl
from ratioctl.utils import resources

photograph = resources.folder("assets") / "samples" / "rocket.jpg"
found = {}
for name in ("cifar10-ratio", "cifar10-plain"):
    clf = ratioctl.Classifier.from_pretrained(name)
    before = clf.predict(photograph)
    found[name] = clf.explain(photograph, target="dog", eps=[0.5, 1, 2, 3], steps=50)
    print(f"{name}: {before.label}, confidence {before.confidence:.2f}, out of distribution: {before.is_ood}")

# %% [markdown]
# RATIO:

# %%
found["cifar10-ratio"]

# %% [markdown]
# The plain model:

# %%
found["cifar10-plain"]

# %%
for name, explanation in found.items():
    ladder = ", ".join(f"{budget.eps:g}: {budget.confidence:.2f}" for budget in explanation.counterfactuals)
    print(f"{name}: dog at budget {ladder}")
