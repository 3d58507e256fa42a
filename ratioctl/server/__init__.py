"""The HTTP server of `ratioctl serve`: an API for programs and a page for people. Only searches load torch.

Reading order: `settings` (limits), `problems` (errors as answers), `scoring` (batches of images of several
requests), `jobs` (counterfactual searches), `metrics`, `service` (all of these for the models of one server),
`uploads` and `routes` (the API), `guard` (what is refused before it reaches a route), `run` (the process).

Nothing of a request is written to disk, and no answer contains a path of the server's disk.
"""

from ratioctl.server.settings import Settings

__all__ = ["Settings"]
