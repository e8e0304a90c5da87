"""The run as a function of the step: pacing, learning rate, plan, sampler. Imports no torch."""
