"""The command line `stn-fx`, installed as `stn_fx_cli`: it parses and prints; everything it calls is in `stn_fx`."""
