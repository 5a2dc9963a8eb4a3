"""The zoo: names (`zoo`, without PyTorch), classifiers (`build`) and detectors (`detectors`)."""
