"""Commands that run on a cluster as Ray jobs: submitted, followed, stopped; and the states of runs."""
