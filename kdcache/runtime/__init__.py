"""What every stage needs of the process it runs in: progress, resources, ranks, versions, package data."""
