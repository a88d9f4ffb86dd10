module kalamdb.org/e2e/cluster/images

go 1.24.0
