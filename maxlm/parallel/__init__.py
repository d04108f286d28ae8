"""Forms of parallelism that types alone cannot say: a model part is swapped for one that talks to other devices."""
