"""What clipping costs, against its peers: `python -m benchmarks list`.

* `measure`: how a figure is taken, and what a figure is.
* `gates`: what the compiler says; the same on every run, so these are also tests.
* `timed`: what the clock says; ratios of contestants that ran side by side.
* `compiled`: what compilers for an H100, a TPU v5e and a CPU make of each clip. `rows`
  has the clips, `targets` the devices, `compiler` and `hlo` take the figures.
"""
