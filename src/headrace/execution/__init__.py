"""One device, one forward: runner, graphs, sampler, constraints."""
