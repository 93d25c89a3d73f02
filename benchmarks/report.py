def write_report(records, folder):
    raise SystemExit("not yet")
