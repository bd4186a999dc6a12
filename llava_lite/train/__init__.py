"""Train a stage: read flags, build, choose what trains, check the data, train, save."""
