//! Scalar functions of ours: `CURRENT_USER()`.

use std::hash::Hash;

use arrow::datatypes::DataType;
use datafusion::common::ScalarValue;
use datafusion::error::Result;
use datafusion::execution::context::SessionState;
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility};

use super::session;
use crate::auth::Identity;

/// Registers the functions that speak for the caller. The session is made for one request and dropped with it.
pub(super) fn register(state: &mut SessionState, identity: &Identity) -> Result<()> {
    session::register(state, ScalarUDF::from(CurrentUser::new(identity.user.as_str())))
}

/// `CURRENT_USER()`: the user id.
#[derive(Debug, PartialEq, Eq, Hash)]
struct CurrentUser {
    user: String,
    signature: Signature,
}

impl CurrentUser {
    fn new(user: &str) -> Self {
        Self { user: user.to_owned(), signature: Signature::nullary(Volatility::Stable) }
    }
}

impl ScalarUDFImpl for CurrentUser {
    fn name(&self) -> &str {
        "current_user"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Utf8)
    }

    fn invoke_with_args(&self, _: ScalarFunctionArgs) -> Result<ColumnarValue> {
        Ok(ColumnarValue::Scalar(ScalarValue::Utf8(Some(self.user.clone()))))
    }
}
