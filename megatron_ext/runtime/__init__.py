"""The machine under the run: environment, device, process group, signals, logs, launcher. The door to os.environ."""
