//! Path templates: `{namespace}`, `{tableName}`, `{userId}` between literals, below a storage's root.

use crate::names::TableName;

const ALLOWED: &str = "`{userId}`, `{namespace}` and `{tableName}`";

/// The place of the user id in a template; `${user_id}` is taken as the same when a template is declared.
pub const USER: &str = "{userId}";

/// Checks and completes a storage's template for user tables: it must contain `{userId}` before everything that varies;
/// missing `{namespace}` and `{tableName}` are appended.
///
/// # Errors
/// Says what is wrong, for people.
pub fn user(template: &str) -> Result<String, String> {
    let template = normalize(template)?;
    let user = template
        .find(USER)
        .ok_or_else(|| format!("`{template}` must contain `{{userId}}`, or all users would share one folder"))?;
    for variable in ["{namespace}", "{tableName}"] {
        if template.find(variable).is_some_and(|at| at < user) {
            return Err(format!("`{{userId}}` must come before `{variable}` in `{template}`"));
        }
    }
    Ok(complete(template))
}

/// Checks and completes a storage's template for shared tables: it must not contain `{userId}`.
///
/// # Errors
/// Says what is wrong, for people.
pub fn shared(template: &str) -> Result<String, String> {
    let template = normalize(template)?;
    if template.contains(USER) {
        return Err(format!("`{template}` is for shared tables and must not contain `{{userId}}`"));
    }
    Ok(complete(template))
}

/// Checks an inline location of one table (the part below the storage's root): user tables need `{userId}`, shared ones
/// must not have it; other variables are not filled in here.
///
/// # Errors
/// Says what is wrong, for people.
pub fn inline(template: &str, for_users: bool) -> Result<String, String> {
    let template = normalize(template)?;
    match (template.contains(USER), for_users) {
        (false, true) => Err(format!("the location `{template}` of a user table must contain `{{userId}}`")),
        (true, false) => Err(format!("the location `{template}` of a shared table must not contain `{{userId}}`")),
        _ => Ok(template),
    }
}

/// Fills in everything but the user.
#[must_use]
pub fn resolve(template: &str, table: &TableName) -> String {
    template.replace("{namespace}", table.namespace.as_str()).replace("{tableName}", table.table.as_str())
}

/// Whether two resolved templates of one root could name one object: one is, segment by segment, a prefix of the other,
/// where `{userId}` stands for any segment.
#[must_use]
pub fn overlap(a: &str, b: &str) -> bool {
    a.split('/').zip(b.split('/')).all(|(x, y)| x == y || x.contains(USER) || y.contains(USER))
}

fn complete(mut template: String) -> String {
    for variable in ["{namespace}", "{tableName}"] {
        if !template.contains(variable) {
            template.push('/');
            template.push_str(variable);
        }
    }
    template
}

fn normalize(template: &str) -> Result<String, String> {
    let template = template.replace("${user_id}", USER).replace("{user_id}", USER).replace("${userId}", USER);
    let template = template.trim_matches('/').to_owned();
    if template.is_empty() {
        return Err("a path template must not be empty".to_owned());
    }
    if template.len() > 512 {
        return Err("a path template has at most 512 bytes".to_owned());
    }
    for segment in template.split('/') {
        check_segment(segment, &template)?;
    }
    if template.matches(USER).count() > 1 {
        return Err(format!("`{{userId}}` stands more than once in `{template}`"));
    }
    if template.starts_with('_') {
        return Err(format!("`{template}` must not begin with `_`: such folders are KalamDB's own"));
    }
    Ok(template)
}

fn check_segment(segment: &str, template: &str) -> Result<(), String> {
    let literal = segment.replace("{namespace}", "").replace("{tableName}", "").replace(USER, "");
    if literal.contains(['{', '}', '$']) {
        return Err(format!("unknown variable in `{template}`; allowed are {ALLOWED}"));
    }
    if segment.contains(USER) && segment != USER {
        return Err(format!("`{{userId}}` must be a whole path segment in `{template}`"));
    }
    if segment.is_empty() || segment == "." || segment == ".." {
        return Err(format!("`{template}` has an empty, `.` or `..` segment"));
    }
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_' | '.');
    if !literal.chars().all(plain) {
        return Err(format!("`{template}` may hold only lower-case letters, digits, `-`, `_`, `.` and variables"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_completed() {
        assert_eq!(user("users/${user_id}").expect("valid"), "users/{userId}/{namespace}/{tableName}");
        assert_eq!(shared("/shared/{namespace}/").expect("valid"), "shared/{namespace}/{tableName}");
    }

    #[test]
    fn wrong_templates_say_why() {
        assert!(user("users/{tenant}").expect_err("unknown").contains("{namespace}"));
        assert!(user("data/{namespace}/{tableName}").expect_err("no user").contains("{userId}"));
        assert!(user("{namespace}/{userId}").expect_err("order").contains("before"));
        assert!(shared("x/{userId}").is_err());
        for bad in ["", "a//b", "../x", "_cluster/x", "u-{userId}", "A/{userId}", "{userId}/{userId}"] {
            assert!(user(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn overlapping_prefixes_are_found() {
        assert!(overlap("users/{userId}/app", "users/{userId}/app/messages"));
        assert!(overlap("users/{userId}/app/a", "users/bob/app/a"));
        assert!(!overlap("users/{userId}/app/a", "users/{userId}/app/b"));
        assert!(!overlap("users/{userId}/app/a", "shared/app/a"));
    }
}
