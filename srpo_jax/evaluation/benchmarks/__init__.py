"""Published benchmarks, one small file each: layout of the user's copy, items, protocol, caveats."""
