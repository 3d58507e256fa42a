"""RATIO beside a plain model: the same question to both, on one page."""

import ratioctl

models = ["cifar10-ratio", "cifar10-plain"]
answers = ratioctl.counterfactual(
    ["assets/samples/rocket.jpg"], target="dog", eps=[0.5, 2], model=models, steps=50, out="both"
)
for model, answer in zip(models, answers, strict=True):
    original, budgets = answer.original, answer.targets[0].budgets
    print(f"{model}: {original.label} {original.confidence:.2f}, OOD: {original.is_ood}")
    print("  dog by budget:", ", ".join(f"{b.eps:g}: {b.confidence:.2f}" for b in budgets))
