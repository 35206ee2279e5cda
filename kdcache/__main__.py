"""`python -m kdcache`: the command line, also for torchrun, which starts modules."""

from kdcache.cli import main

main()
