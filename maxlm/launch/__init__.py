"""`maxlm launch`: starts a run on other machines, watches it, and leaves nothing billing. One file per target."""
