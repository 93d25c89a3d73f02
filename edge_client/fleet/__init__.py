"""Many simulated devices in one process: the load test of a coordinator.

The devices are real sessions with real keys over real sockets. They need no torch and no backbone;
they claim the federation's fingerprint, wait where others train, and report noise.
"""
