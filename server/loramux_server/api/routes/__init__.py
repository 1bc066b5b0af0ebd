"""One module per group of routes; each builds an APIRouter from the ApiContext."""
