"""The machine under the run: environment, device, process group, signals, logs, the launcher. The only door to os.environ."""
