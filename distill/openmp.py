"""Import before torch: threads that wait must sleep, not spin.

OpenMP's threads spin for a while between parallel regions by default. Where another program wants the cores, the
spinning takes them away, from both: see `scripts/bench/threads.py` and docs/reliability.md.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
