# %% [markdown]
# # A threshold for a false-alarm budget
#
# How many of the images that a model knows may be flagged by mistake? That share is a budget, and a
# threshold follows from it. So that this page runs in a minute, the model is a small one for scikit-learn's
# digits; with your own, start at the second cell.

# %%
import ratioctl

model = ratioctl.train("digits-oe", settings=["model.width=8", "optim.epochs=3"])

# %% [markdown]
# Rules choose thresholds on images that the training has not seen, and store them in the package under names
# of yours. `keep:0.95` flags at most 5 % of these images; `conformal:0.05` flags a *new* image with a
# probability of at most 5 %; `pass:0.01@photo` accepts at most 1 % of the unknown images `photo`.

# %%
calibrated = ratioctl.calibrate(
    model,
    data="digits:test",
    ood={"photo": "photos:flower", "noise": "noise:smooth"},
    thresholds={"budget": "keep:0.95", "guarantee": "conformal:0.05", "strict": "pass:0.01@photo"},
)
for name, threshold in calibrated.package.thresholds.items():
    print(f"{name}: {threshold:.3f}")

# %% [markdown]
# What each of them accepts of the three sets. `ratioctl thresholds runs/digits-oe/package` prints it as a
# table, with exact 95 % intervals.

# %%
for record in calibrated.package.config["ratio"]["threshold_records"]:
    sets = [record["id"], *record["ood"]]
    print(record["name"], record["rule"], *(f"{one['set']}: {one['rate']:.1%}" for one in sets), sep="  ")

# %% [markdown]
# Every command takes the name of a threshold:

# %%
from sklearn.datasets import load_digits

images = [(pixels * 15.9).astype("uint8") for pixels in load_digits().images[:200]]
rows = list(ratioctl.ood_score(images, model=calibrated.package, threshold="budget"))
print(f"{sum(row.is_ood for row in rows)} of {len(rows)} digits are flagged")
