"""The HTTP service: a thin edge over the façade, whose only state is a folder of jobs."""
