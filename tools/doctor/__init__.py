"""`symile-dist doctor`: whether machines, network, storage and data are what a run needs, before it is started."""
