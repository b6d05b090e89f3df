"""`python -m hub_gateway` is `jupyter hubgateway`."""

from hub_gateway.app import main

if __name__ == "__main__":
    main()
