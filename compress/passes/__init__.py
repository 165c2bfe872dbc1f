"""Every pass of the toolkit, one file each."""
