"""`python -m medv.companion.site RUN TARGET [SPHINX OPTIONS]`: what `make docs` runs."""

import sys

from medv.companion.site.build import build

if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("two folders are needed: the run, and the place of the site")
    sys.exit(build(sys.argv[1], sys.argv[2], options=tuple(sys.argv[3:])))
