"""Labs: one file per technique, each a lesson and a tool; `python -m labs.NAME --help`."""

import model as modeling  # noqa: F401  before a lab imports torch: it says how threads wait
