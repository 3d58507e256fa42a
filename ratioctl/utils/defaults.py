"""Names that several packages and the command line share."""

DEFAULT_MODEL = "cifar10-ratio"  # the bundled model that is used where none is named
CERTIFIED = "certified:"  # before the name of the base: architectures with a certified head
