"""From a base model and preference pairs to an aligned model whose numbers can be defended."""

import os

# Nobody is told that this runs: TRL pings the hub at each trainer's start otherwise.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
