"""A run in Prometheus, Grafana and Alertmanager: what these are given, and a Prometheus of one's own."""
