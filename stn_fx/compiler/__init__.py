"""The compiler: capture -> analyse -> plan -> rewrite -> verify, each a function from data to data."""
