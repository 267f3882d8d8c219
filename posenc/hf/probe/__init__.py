"""What ``posenc.apply`` measures on a model before it installs its hooks, and which models it refuses."""
