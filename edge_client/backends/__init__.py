"""What trains: one Trainer a runtime, behind one contract."""
