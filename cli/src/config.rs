//! Where endpoints, trust and secrets come from: flags, else the environment, else a file. Each value by itself, so
//! that a flag may change the tenant and leave the rest to the file.

use std::{
    env, fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use api::error::ApiError;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::{arguments::Global, output::Format};

/// `client.toml`. A field that this version does not know is refused: a misspelt one would be ignored silently.
#[derive(Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    /// `host:port` or `unix:/path`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<String>,
    /// The PEM text, or a path, relative to this file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<Format>,
}

impl ConfigFile {
    /// Writes it readable by its owner only: it holds a token.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let text = toml::to_string(self).map_err(io::Error::other)?;
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let beside = path.with_extension("new");
        // One left by a crash may have another mode.
        match fs::remove_file(&beside) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)
    }
}

/// All that a client needs.
#[derive(Debug, PartialEq)]
pub struct Config {
    pub endpoints: Vec<String>,
    pub ca_pem: String,
    pub token: String,
    pub tenant: String,
}

impl Config {
    /// # Errors
    /// When a file cannot be read or is not valid, or something needed is nowhere.
    pub fn load(global: &Global) -> Result<Self, ApiError> {
        let (file, path) = read_file(global, &variable)?;
        Self::resolve(global, &variable, file, &path)
    }

    fn resolve(
        global: &Global,
        variable: &impl Fn(&str) -> Option<String>,
        file: ConfigFile,
        path: &Path,
    ) -> Result<Self, ApiError> {
        let missing = |what: &str, flag: &str, name: &str| {
            let path = path.display();
            ApiError::invalid(format!("no {what} is known: give --{flag}, set {name}, or write it into {path}"))
        };
        let listed =
            || variable("TREFOIL_ENDPOINTS").map(|text| text.split(',').map(|e| e.trim().to_owned()).collect());
        let endpoints = Some(global.endpoints.clone()).filter(|given| !given.is_empty()).or_else(listed);
        let endpoints: Vec<String> = endpoints.unwrap_or(file.endpoints);
        if endpoints.is_empty() {
            return Err(missing("controller", "endpoint", "TREFOIL_ENDPOINTS"));
        }
        let ca_pem = match global.ca.clone().or_else(|| variable("TREFOIL_CA")) {
            Some(given) => pem(&given, Path::new(""))?,
            None => match file.ca {
                Some(given) => pem(&given, path.parent().unwrap_or(Path::new("")))?,
                None => return Err(missing("CA certificate", "ca", "TREFOIL_CA")),
            },
        };
        let token = global.token.clone().or_else(|| variable("TREFOIL_TOKEN")).or(file.token);
        let token = token.ok_or_else(|| missing("token", "token", "TREFOIL_TOKEN"))?;
        let tenant = global.tenant.clone().or_else(|| variable("TREFOIL_TENANT")).or(file.tenant);
        Ok(Self { endpoints, ca_pem, token, tenant: tenant.unwrap_or_default() })
    }
}

/// How to print; needed before anything else, since an error is printed too. The error comes with the format to print
/// it in.
///
/// # Errors
/// When the environment or the file says something else than `table` or `json`.
pub fn format(global: &Global) -> Result<Format, (ApiError, Format)> {
    if let Some(format) = global.output {
        return Ok(format);
    }
    match variable("TREFOIL_OUTPUT") {
        Some(text) => Format::from_str(&text, true).map_err(|_| {
            (ApiError::invalid(format!("TREFOIL_OUTPUT is '{text}', but must be table or json")), Format::Table)
        }),
        // Whether the file can be read is told by the command that needs it.
        None => Ok(read_file(global, &variable).ok().and_then(|(file, _)| file.output).unwrap_or_default()),
    }
}

/// What the configuration file alone says, and where it is: for whoever runs without this process's environment.
///
/// # Errors
/// When it cannot be read or is not valid.
pub fn file(global: &Global) -> Result<(ConfigFile, PathBuf), ApiError> {
    read_file(global, &variable)
}

/// The file, and where it is or would be. Only a file that was asked for must exist.
fn read_file(global: &Global, variable: &impl Fn(&str) -> Option<String>) -> Result<(ConfigFile, PathBuf), ApiError> {
    let asked = global.config.clone().or_else(|| variable("TREFOIL_CONFIG").map(PathBuf::from));
    let path = asked.clone().unwrap_or_else(|| default_path(variable));
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound && asked.is_none() => return Ok((ConfigFile::default(), path)),
        Err(e) => return Err(ApiError::invalid(format!("cannot read {}: {e}", path.display()))),
    };
    let file = toml::from_str(&text).map_err(|e| {
        let line = e.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        ApiError::invalid(format!("{}, line {line}: {}", path.display(), e.message().replace('\n', " ")))
    })?;
    Ok((file, path))
}

/// The file that is read when none is named.
pub fn default_path(variable: &impl Fn(&str) -> Option<String>) -> PathBuf {
    let home = || variable("HOME").map(|home| Path::new(&home).join(".config"));
    let base = variable("XDG_CONFIG_HOME").map(PathBuf::from).or_else(home);
    base.unwrap_or_else(|| PathBuf::from("/etc")).join("trefoil/client.toml")
}

/// An empty variable counts as none.
pub fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn pem(given: &str, base: &Path) -> Result<String, ApiError> {
    if given.contains("-----BEGIN ") {
        return Ok(given.into());
    }
    let path = base.join(given);
    fs::read_to_string(&path)
        .map_err(|e| ApiError::invalid(format!("cannot read the CA certificate {}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CA: &str = "-----BEGIN CERTIFICATE-----";

    fn file() -> ConfigFile {
        let text = |value: &str| Some(value.to_owned());
        ConfigFile {
            endpoints: vec!["file:1".into()],
            ca: text(CA),
            token: text("file"),
            tenant: text("file"),
            output: Some(Format::Json),
        }
    }

    fn environment(name: &str) -> Option<String> {
        matches!(name, "TREFOIL_ENDPOINTS" | "TREFOIL_TOKEN" | "TREFOIL_TENANT")
            .then(|| if name.ends_with('S') { "env:1, env:2".into() } else { "env".into() })
    }

    #[test]
    fn a_flag_wins_over_the_environment_which_wins_over_the_file() {
        let none = |_: &str| None;
        let path = Path::new("/x/client.toml");
        let flags = Global { endpoints: vec!["flag:1".into()], tenant: Some("flag".into()), ..Global::default() };

        let from_file = Config::resolve(&Global::default(), &none, file(), path).unwrap();
        assert_eq!((from_file.endpoints, from_file.token.as_str()), (vec!["file:1".to_owned()], "file"));
        let from_env = Config::resolve(&Global::default(), &environment, file(), path).unwrap();
        assert_eq!(from_env.endpoints, ["env:1", "env:2"]);
        assert_eq!((from_env.token.as_str(), from_env.tenant.as_str(), from_env.ca_pem.as_str()), ("env", "env", CA));
        let from_flags = Config::resolve(&flags, &environment, file(), path).unwrap();
        assert_eq!(from_flags.endpoints, ["flag:1"]);
        assert_eq!((from_flags.token.as_str(), from_flags.tenant.as_str()), ("env", "flag"));
    }

    #[test]
    fn what_is_missing_is_named_with_the_ways_to_give_it() {
        let path = Path::new("/x/client.toml");
        let error = Config::resolve(&Global::default(), &|_| None, ConfigFile::default(), path).unwrap_err();
        assert_eq!(
            error.message,
            "no controller is known: give --endpoint, set TREFOIL_ENDPOINTS, or write it into /x/client.toml"
        );
    }

    #[test]
    fn a_file_is_read_strictly_and_only_its_owner_reads_it() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/client.toml");
        file().save(&path).unwrap();
        file().save(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let global = Global { config: Some(path.clone()), ..Global::default() };
        assert_eq!(read_file(&global, &|_| None).unwrap(), (file(), path.clone()));

        fs::write(&path, "token = \"x\"\nendpoint = \"a:1\"\n").unwrap();
        let error = read_file(&global, &|_| None).unwrap_err();
        assert!(error.message.contains("line 2: unknown field `endpoint`"), "{error}");
        fs::remove_file(&path).unwrap();
        assert!(read_file(&global, &|_| None).is_err(), "a file that was asked for must exist");
        let elsewhere = |name: &str| (name == "XDG_CONFIG_HOME").then(|| dir.path().display().to_string());
        let (found, at) = read_file(&Global::default(), &elsewhere).unwrap();
        assert_eq!((found, at), (ConfigFile::default(), dir.path().join("trefoil/client.toml")));
    }

    #[test]
    fn a_certificate_is_text_or_a_path_beside_the_file() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ca.pem"), CA).unwrap();
        assert_eq!(pem("ca.pem", dir.path()).unwrap(), CA);
        assert_eq!(pem(CA, dir.path()).unwrap(), CA);
        assert!(pem("missing.pem", dir.path()).unwrap_err().message.contains("missing.pem"));
    }
}
