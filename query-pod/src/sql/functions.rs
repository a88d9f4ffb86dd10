//! Scalar functions of ours: `CURRENT_USER()`; and what functions know of the statement that calls them.
//!
//! The function belongs to no caller, as plans that were made before do not ([`super::plans`]): whose name it gives is read
//! when it is evaluated, from the options of the session. Without one it fails.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use arrow::datatypes::DataType;
use datafusion::common::ScalarValue;
use datafusion::common::config::{ConfigEntry, ConfigExtension, ConfigOptions, ExtensionOptions};
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility};
use datafusion::prelude::SessionConfig;

use crate::auth::Identity;

/// The function, for all sessions.
pub(super) fn current_user() -> ScalarUDF {
    ScalarUDF::from(CurrentUser { signature: Signature::nullary(Volatility::Stable) })
}

/// Lets functions in a session of `config` speak for `identity`, for one statement.
pub(super) fn speak_for(identity: &Identity, config: &mut SessionConfig) {
    let caller = Caller { user: identity.user.to_string(), constants_made: Arc::default() };
    config.options_mut().extensions.insert(caller);
}

/// How many bytes functions have made of the statement's constants, for them to count.
pub(super) fn constants_made(options: &ConfigOptions) -> Option<&AtomicU64> {
    options.extensions.get::<Caller>().map(|caller| &*caller.constants_made)
}

/// What functions know of a statement; `user` is its caller's id.
#[derive(Clone, Debug)]
struct Caller {
    user: String,
    constants_made: Arc<AtomicU64>,
}

impl ConfigExtension for Caller {
    const PREFIX: &'static str = "kalam_caller";
}

impl ExtensionOptions for Caller {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn cloned(&self) -> Box<dyn ExtensionOptions> {
        Box::new(self.clone())
    }

    fn set(&mut self, _: &str, _: &str) -> Result<()> {
        Err(DataFusionError::Configuration("the caller of a session is not set by statements".to_owned()))
    }

    fn entries(&self) -> Vec<ConfigEntry> {
        Vec::new()
    }
}

/// `CURRENT_USER()`: the user id.
#[derive(Debug, PartialEq, Eq, Hash)]
struct CurrentUser {
    signature: Signature,
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

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let caller = args.config_options.extensions.get::<Caller>();
        let caller = caller.ok_or_else(|| {
            DataFusionError::Internal("CURRENT_USER() in a session without an identity was refused".to_owned())
        })?;
        Ok(ColumnarValue::Scalar(ScalarValue::Utf8(Some(caller.user.clone()))))
    }
}

#[cfg(test)]
mod tests {
    use datafusion::prelude::SessionContext;
    use kalamdb_model::{Role, UserId};

    use super::*;

    #[tokio::test]
    async fn the_callers_name_is_the_sessions_and_without_one_there_is_none() {
        let name = async |config: SessionConfig| {
            let context = SessionContext::new_with_config(config);
            let batches = context.read_empty()?.select(vec![current_user().call(Vec::new())])?.collect().await?;
            arrow::util::display::array_value_to_string(batches[0].column(0), 0).map_err(DataFusionError::from)
        };
        let refused = name(SessionConfig::new()).await.unwrap_err().to_string();
        assert!(refused.contains("without an identity"), "{refused}");
        for user in ["alice", "bob"] {
            let mut config = SessionConfig::new();
            speak_for(&Identity { user: UserId::new(user).unwrap(), role: Role::User }, &mut config);
            assert_eq!(name(config).await.unwrap(), user);
        }
    }
}
