"""What ``quantize`` is made of besides its layers: sites, ranges, bits chosen site by site, NNCF's engine."""
